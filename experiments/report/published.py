"""The numbers that the study published: errors on its ten sequences, and log10 of FLOPs as it counts them.

The study chose its models on the same ten sequences, decoded with a repetition penalty of 1.1 and trained with
unmasked padding.
"""

VALIDATION = {  # experiment: MSE, free-running loss
    "untrained": (0.2702, 1.785),
    "trial": (0.1248, 1.6563),
    "context-128": (0.1177, 2.6090),
    "context-512": (0.0230, 2.0401),
    "context-768": (0.0051, 1.5362),
    "final": (0.0021, 1.2128),
}
TEST = {"final": (0.0071, 1.9080)}
RATES = (1e-5, 5e-5, 1e-4)
GRID = {  # rank: MSE and free-running loss at each of RATES
    2: ((0.0561, 1.7700), (0.0100, 1.4630), (0.0148, 1.6718)),
    4: ((0.0375, 1.6040), (0.0251, 1.7418), (0.0133, 1.8379)),
    8: ((0.0328, 1.6141), (0.0256, 1.9905), (0.0071, 1.6746)),
}
TRAINING_FLOPS = {
    "trial": 15.38,
    "grid": 15.68,  # each cell
    "context-128": 15.06,
    "context-512": 15.68,
    "context-768": 15.87,
    "final": 16.35,
}
SECTION_FLOPS = {"6.2": 15.38, "6.3": 16.64, "6.4": 16.13, "6.5": 16.35, "all": 16.91}
