"""edge_llm and its peers behind one interface, so that a benchmark asks all of them the same.

``engine.py`` is the interface, and opens an engine by its name; a module for each of them makes its
files from a Hugging Face checkpoint. What a peer needs is in the extra ``benchmarks``.
"""
