"""A clock that only the forms of a kernel move on."""

from collections.abc import Callable

import mlx.core as mx

from ahn_mlx.ops.kernels import Check, Sizes


class Clock:
    """In place of time.perf_counter. calls: of either form, and the sizes they had."""

    def __init__(self) -> None:
        self.now, self.launch = 0.0, 0.0  # seconds that it takes to begin
        self.asked: list[Sizes] = []

    def __call__(self) -> float:
        self.now += self.launch
        return self.now

    def check(
        self,
        ours: float,
        theirs: float,
        name: str = "copy",
        change: Callable[[mx.array, Sizes], mx.array] = lambda x, sizes: x,
    ) -> Check:
        """Two forms that double a number in so many seconds; `change` is what ours does to it."""

        def form(seconds: float, change: Callable[[mx.array, Sizes], mx.array]):
            def run(x: mx.array, sizes: Sizes) -> mx.array:
                self.now += seconds
                self.asked.append(sizes)
                return change(2 * x, sizes)

            return run

        return Check(
            name=name,
            files=(),
            dispatches=1,
            example=lambda sizes, before: (mx.random.normal((4,)), sizes),
            ours=form(ours, change),
            theirs=form(theirs, lambda x, sizes: x),
        )
