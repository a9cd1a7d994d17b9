"""A graph whose inputs and outputs are bound to memory that this process holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import RuntimeFailure
from edge_llm.manifest import StateTensor
from edge_llm.runtime.decoder import Interrupted
from edge_llm.runtime.session import import_onnxruntime, onnxruntime_errors

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["BoundGraph"]

_CHECK = "Check the files with `edge-llm info --verify`, or export the bundle again."

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class BoundGraph:
    """One session, one IOBinding, and the memory that is bound.

    What is bound stays bound; a run reads and writes it.

    Args:
        session: The graph.

    Attributes:
        session: The graph.
        inputs: Names of all inputs.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._ort = import_onnxruntime()
        self.session = session
        self._options = self._ort.RunOptions()
        # The default, which CPUs ignore. Without it onnxruntime's wrapper raises and catches an
        # exception at every run: 50 us.
        self._options.add_run_config_entry("gpu_graph_id", "0")
        self._binding = session.io_binding()
        # Element type and shape that the graph declares; a symbolic size is a string or None.
        self._declared: dict[str, tuple[str, Sequence[int | str | None]]] = {
            one.name: (_DTYPES.get(one.type, one.type), one.shape)
            for one in (*session.get_inputs(), *session.get_outputs())
        }
        self.inputs: frozenset[str] = frozenset(one.name for one in session.get_inputs())
        # OrtValues only point at numpy's memory, so both are kept alive here.
        self._values: dict[str, Any] = {}

    def check(
        self, name: str, *, dtypes: Collection[str], shape: Sequence[int | str | None]
    ) -> np.dtype[Any]:
        """Refuse a graph that lacks an input or output, or declares it otherwise.

        Args:
            name: Of the input or output.
            dtypes: numpy's names of the element types that will do.
            shape: Sizes; what is no integer may be of any size.

        Returns:
            The element type.

        Raises:
            RuntimeFailure: The graph's is missing, or is of another type or shape.
        """
        if name not in self._declared:
            raise RuntimeFailure(f"The graph has no {name!r}, which its layout asks for.", _CHECK)
        dtype, sizes = self._declared[name]
        fits = len(sizes) == len(shape) and all(
            not isinstance(a, int) or not isinstance(b, int) or a == b
            for a, b in zip(sizes, shape, strict=True)
        )
        if dtype not in dtypes or not fits:
            raise RuntimeFailure(
                f"The graph's {name!r} is {dtype} {list(sizes)}; the manifest and the layout ask "
                f"for {' or '.join(sorted(dtypes))} {list(shape)}.",
                _CHECK,
            )
        return np.dtype(dtype)

    def check_state(self, state: Sequence[StateTensor]) -> None:
        """Refuse a graph whose state is not the manifest's.

        Raises:
            RuntimeFailure: A tensor is missing, or is of another type or shape.
        """
        for one in state:
            for name in (one.input, one.output):
                self.check(name, dtypes=(one.dtype,), shape=one.shape)

    def check_inputs(self, known: Collection[str]) -> None:
        """Refuse a graph that asks for inputs besides those known.

        Raises:
            RuntimeFailure: It does.
        """
        unknown = sorted(self.inputs.difference(known))
        if unknown:
            raise RuntimeFailure(
                f"The graph asks for {', '.join(map(repr, unknown))}, which its layout does not "
                "have.",
                _CHECK,
            )

    def shape(self, name: str) -> Sequence[int | str | None]:
        """Sizes that the graph declares for an input or output; a symbolic one is no integer."""
        return self._declared[name][1]

    def value(self, array: NDArray[Any]) -> Any:
        """An OrtValue that points at a contiguous array's memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def bind(self, name: str, array: NDArray[Any], *, output: str = "") -> None:
        """Bind an input, and perhaps an output, to an array."""
        value = self.value(array)
        self.bind_value(name, value)
        if output:
            self._binding.bind_ortvalue_output(output, value)

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        """Bind an output to an array."""
        self.bind_output_value(name, self.value(array))

    def bind_value(self, name: str, value: Any) -> None:
        """Bind an input to an OrtValue."""
        self._values[name] = value
        self._binding.bind_ortvalue_input(name, value)

    def bind_output_value(self, name: str, value: Any) -> None:
        """Bind an output to an OrtValue."""
        self._values[name] = value
        self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Compute the outputs.

        Raises:
            Interrupted: :meth:`interrupt` was called.
            RuntimeFailure: ONNX Runtime failed.
        """
        try:
            self.session.run_with_iobinding(self._binding, self._options)
        except onnxruntime_errors() as error:
            if self._options.terminate:
                raise Interrupted from None
            raise RuntimeFailure(f"ONNX Runtime failed in a step: {error}", _CHECK) from error

    def interrupt(self) -> None:
        """End the run between two operators, and every later one; any thread."""
        self._options.terminate = True

    def resume(self) -> None:
        """Allow runs again."""
        self._options.terminate = False
