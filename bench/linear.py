"""Compare torch's own matrix product with oneDNN's in float32 linear layers on one CPU thread, in GFLOP/s.

    OMP_NUM_THREADS=1 python bench/linear.py

Shapes are rows x inputs x outputs. The three products are the forward pass, the gradient of the input and the gradient
of the weight. The last line is the median ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from common import machine
from forgetlearn.models.onednn import _multiply, onednn_is_faster

SHAPES = [(rows, *sides) for rows in (16, 128, 384) for sides in ((256, 688), (688, 256), (256, 8000), (1024, 4096))]


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    print(f"{torch.cpu.get_capabilities().get('cpu_name')}; forgetlearn uses oneDNN here: {onednn_is_faster()}")
    print(f"{'':20}{'torch':>9}{'oneDNN':>9}{'torch':>9}{'oneDNN':>9}{'torch':>9}{'oneDNN':>9}")
    ratios = []
    for shape in SHAPES:
        found = rates(*shape)
        ratios += [found[index + 1] / found[index] for index in (0, 2, 4)]
        print(f"{' x '.join(map(str, shape)):20}" + "".join(f"{rate:9.0f}" for rate in found))
    print(f"ratio {statistics.median(ratios):.2f}")


def rates(rows: int, n_in: int, n_out: int) -> list[float]:
    """GFLOP/s of the three products, each by torch and by oneDNN."""
    x, weight, grad = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(rows, n_out)
    products = (
        lambda: functional.linear(x, weight),
        lambda: _multiply(x, weight),
        lambda: grad @ weight,
        lambda: _multiply(grad, weight.t()),
        lambda: grad.t() @ x,
        lambda: _multiply(grad.t(), x.t()),
    )
    return [2e-9 * rows * n_in * n_out / seconds(product) for product in products]


@torch.inference_mode()
def seconds(run: Callable[[], object], repeats: int = 30) -> float:
    """The least CPU time of a call."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
