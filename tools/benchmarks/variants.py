"""The published variants in numbers, for benchmarks of operators on machines that have torch alone.

A test compares them with the network, which needs mmengine.
"""

from __future__ import annotations

VARIANTS = ('xt', 't', 's', 'b')
#: Channels of stages 1 to 4, and groups of the dynamic kernels of stages 3 and 4.
CHANNELS = {'xt': (56, 112, 256, 336), 't': (64, 128, 256, 512), 's': (64, 128, 320, 512), 'b': (80, 160, 384, 576)}
NUM_GROUPS = {'xt': (8, 12), 't': (8, 16), 's': (16, 32), 'b': (12, 18)}
KERNEL_SIZES = (17, 15, 13, 7)
MLP_RATIO, SUB_MLP_RATIO = 4, 3
SMALL_KERNEL_SIZE, CONTEXT_SIZE = 5, 7
#: (kernel size, dilation) of the branches beside the large kernels.
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
}


def map_size(image: tuple[int, int], stage: int) -> tuple[int, int]:
    """Height and width of the map of a stage, 1 to 4."""
    height, width = (-(-side // 2 ** (stage + 1)) for side in image)
    return height, width
