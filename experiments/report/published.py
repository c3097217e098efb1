"""The numbers that the study published, by the names that the experiments have in our plan `study`.

The errors are those of ten sequences. The study chose its models on the same ten of the validation part, decoded with a
repetition penalty of 1.1 and trained with unmasked padding.
"""

Published = dict[str, tuple[float, float, float | None]]  # MSE, free-running loss, log10 FLOPs of the training

VALIDATION: Published = {
    "untrained": (0.2702, 1.785, None),
    "trial": (0.1248, 1.6563, 15.38),
    "context-128": (0.1177, 2.6090, 15.06),
    "context-512": (0.0230, 2.0401, 15.68),
    "context-768": (0.0051, 1.5362, 15.87),
    "final": (0.0021, 1.2128, 16.35),
    "grid-r2-lr1e-05": (0.0561, 1.7700, 15.68),
    "grid-r2-lr5e-05": (0.0100, 1.4630, 15.68),
    "grid-r2-lr0.0001": (0.0148, 1.6718, 15.68),
    "grid-r4-lr1e-05": (0.0375, 1.6040, 15.68),
    "grid-r4-lr5e-05": (0.0251, 1.7418, 15.68),
    "grid-r4-lr0.0001": (0.0133, 1.8379, 15.68),
    "grid-r8-lr1e-05": (0.0328, 1.6141, 15.68),
    "grid-r8-lr5e-05": (0.0256, 1.9905, 15.68),
    "grid-r8-lr0.0001": (0.0071, 1.6746, 15.68),
}
TEST: Published = {"final": (0.0071, 1.9080, 16.35)}
ERRORS = {"val": VALIDATION, "test": TEST}
