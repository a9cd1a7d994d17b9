"""From a Hugging Face checkpoint to a verified bundle; imported as edge_llm_export."""
