"""The numbers that the study published, by the names that the experiments have in our plan `study`.

The errors are those of ten sequences. The study chose its models on the same ten of the validation part, decoded with a
repetition penalty of 1.1 and trained with unmasked padding.
"""

VALIDATION = {  # MSE, free-running loss
    "untrained": (0.2702, 1.785),
    "trial": (0.1248, 1.6563),
    "context-128": (0.1177, 2.6090),
    "context-512": (0.0230, 2.0401),
    "context-768": (0.0051, 1.5362),
    "final": (0.0021, 1.2128),
    "grid-r2-lr1e-05": (0.0561, 1.7700),
    "grid-r2-lr5e-05": (0.0100, 1.4630),
    "grid-r2-lr0.0001": (0.0148, 1.6718),
    "grid-r4-lr1e-05": (0.0375, 1.6040),
    "grid-r4-lr5e-05": (0.0251, 1.7418),
    "grid-r4-lr0.0001": (0.0133, 1.8379),
    "grid-r8-lr1e-05": (0.0328, 1.6141),
    "grid-r8-lr5e-05": (0.0256, 1.9905),
    "grid-r8-lr0.0001": (0.0071, 1.6746),
}
ERRORS = {"val": VALIDATION, "test": {"final": (0.0071, 1.9080)}}
TRAINING_FLOPS = {  # log10
    "trial": 15.38,
    "context-128": 15.06,
    "context-512": 15.68,
    "context-768": 15.87,
    "final": 16.35,
} | {name: 15.68 for name in VALIDATION if name.startswith("grid")}
SECTION_FLOPS = {"6.2": 15.38, "6.3": 16.64, "6.4": 16.13, "6.5": 16.35, "all": 16.91}  # log10
