"""The paper's settings and figures, as numbers.

Source: Ni et al., "Forgetting before Learning", ACL 2024, arXiv:2311.08011, version 2 of 16 February 2024, which
changed figures of version 1. Scores are in percent, times in seconds. Figures 4 to 7 are read off the plots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Like = Literal["llama-2-7b", "llama-7b", "bloom-7b"]
DataName = Literal["zsre", "counterfact"]
MODELS: Mapping[Like, str] = {"llama-2-7b": "LLaMA-2-7B", "llama-7b": "LLaMA-7B", "bloom-7b": "BLOOM-7B"}
TITLES: Mapping[DataName, str] = {"zsre": "ZsRE", "counterfact": "COUNTERFACT"}
ORIGINAL = "original"
RATE = 5e-5


class Scores(NamedTuple):
    """A row of table 1 or 2, by the protocol `token`. The original model has no locality."""

    reliability: float
    generality: float
    locality: float | None = None


@dataclass(frozen=True)
class Setting:
    """What the paper used for one model and one data set, and the scores that it prints, by method."""

    coefs: Mapping[str, float]
    scores: Mapping[str, Scores]
    learning_rate: float = RATE


SETTINGS: Mapping[tuple[Like, DataName], Setting] = {
    ("llama-2-7b", "zsre"): Setting(
        {"f-lora": 0.7, "f-lora-ft": 3.0, "f-ft": 0.3},
        {
            ORIGINAL: Scores(43.70, 43.17),
            "lora": Scores(43.10, 42.20, 70.83),
            "f-lora": Scores(46.91, 46.21, 72.50),
            "ft-c": Scores(49.02, 46.96, 67.37),
            "ft": Scores(81.02, 74.67, 70.51),
            "rome": Scores(43.67, 42.66, 93.14),
            "memit": Scores(83.57, 79.06, 70.52),
            "f-lora-ft": Scores(82.43, 77.38, 71.04),
            "f-ft": Scores(84.65, 81.51, 70.92),
        },
    ),
    ("llama-2-7b", "counterfact"): Setting(
        {"f-lora": 1.5, "f-lora-ft": 3.0, "f-ft": 0.1},
        {
            ORIGINAL: Scores(18.47, 16.95),
            "lora": Scores(30.56, 23.24, 40.08),
            "f-lora": Scores(31.17, 23.63, 40.42),
            "ft-c": Scores(29.23, 19.32, 19.70),
            "ft": Scores(65.99, 44.08, 28.34),
            "rome": Scores(18.41, 17.20, 93.60),
            "memit": Scores(61.94, 37.45, 21.90),
            "f-lora-ft": Scores(78.73, 51.67, 29.49),
            "f-ft": Scores(69.53, 45.56, 28.41),
        },
    ),
    ("llama-7b", "zsre"): Setting(
        {"f-lora": 0.7, "f-lora-ft": 2.0, "f-ft": 0.3},
        {
            ORIGINAL: Scores(43.29, 42.85),
            "lora": Scores(46.93, 45.87, 75.86),
            "f-lora": Scores(47.56, 46.90, 76.09),
            "ft-c": Scores(47.33, 45.51, 68.14),
            "ft": Scores(70.52, 66.69, 65.26),
            "rome": Scores(43.45, 42.94, 98.60),
            "memit": Scores(78.30, 77.43, 69.44),
            "f-lora-ft": Scores(75.17, 70.12, 69.78),
            "f-ft": Scores(83.06, 79.50, 70.09),
        },
    ),
    ("llama-7b", "counterfact"): Setting(
        {"f-lora": 1.0, "f-lora-ft": 3.0, "f-ft": 0.05},
        {
            ORIGINAL: Scores(21.61, 17.88),
            "lora": Scores(27.54, 21.21, 39.75),
            "f-lora": Scores(29.47, 22.89, 44.91),
            "ft-c": Scores(26.97, 17.90, 20.09),
            "ft": Scores(32.13, 31.95, 32.51),
            "rome": Scores(21.83, 19.08, 92.27),
            "memit": Scores(56.94, 31.48, 25.70),
            "f-lora-ft": Scores(32.43, 26.89, 37.14),
            "f-ft": Scores(56.39, 39.75, 31.87),
        },
        learning_rate=1e-5,
    ),
    ("bloom-7b", "zsre"): Setting(
        {"f-lora": 0.1, "f-lora-ft": 3.0, "f-ft": 0.2},
        {
            ORIGINAL: Scores(27.99, 27.89),
            "lora": Scores(29.25, 29.07, 77.17),
            "f-lora": Scores(29.27, 29.11, 77.40),
            "ft": Scores(44.60, 43.52, 63.74),
            "f-lora-ft": Scores(44.70, 43.71, 65.50),
            "f-ft": Scores(44.79, 43.83, 69.26),
        },
    ),
}

FACTS: Mapping[DataName, int] = {"zsre": 19_085, "counterfact": 10_000}

# FT-c of table 1 (appendix A.2), and the layers of figures 4 and 5. LLaMA has 32 layers.
LAYERS = 32
FT_C_LAYER = 21
FT_C: Mapping[str, float] = {"epochs": 5, "learning_rate": 5e-5, "batch_size": 1}
DISTANCE_LAYERS = (6, 15, 24, 30)

# ROME and MEMIT of table 1: settings of the section `edit`. Layers, weight decay and kl_factor are the defaults.
EDITING: Mapping[str, Mapping[str, float]] = {
    "rome": {"steps": 25, "learning_rate": 5e-3},
    "memit": {"steps": 25, "learning_rate": 5e-2},
}

# Table 3: seconds for each number of edits, on ZsRE.
EDITS = (1, 10, 100)
SECONDS: Mapping[str, tuple[float, float, float]] = {
    "ft-c": (0.57, 6.58, 21.8),
    "rome": (20.5, 207, 2184),
    "memit": (28.3, 109, 862),
    "ft": (0.76, 7.8, 25.4),
    "f-ft": (1.58, 15.3, 52.2),
}

# Table 5: percent right of the original, the forgotten and the updated model, with f-ft at 0.3. The paper has nine
# subjects of MMLU; these are the ones whose figures are known here. The names are lm-evaluation-harness's.
ABILITY: Mapping[str, tuple[float, float, float]] = {
    "gsm8k": (2.35, 2.5, 1.44),
    "minerva_math": (3.2, 3.0, 1.96),
    "mmlu_college_chemistry": (24, 34, 41),
    "mmlu_professional_law": (26.5, 25.6, 24.5),
}


class Forgetting(NamedTuple):
    """Figures 4 to 7 for one way of forgetting.

    `distances` holds the smallest and the largest Euclidean distance of a matrix, at coefficient 1, by part of a layer.
    `reliability` (of the OLD answers) and `locality` of the forgotten model are given by coefficient, in percent.
    """

    distances: Mapping[str, tuple[float, float]]
    reliability: Mapping[float, float]
    locality: Mapping[float, float]


FORGETTING: Mapping[str, Forgetting] = {
    "all weights": Forgetting(
        {"attention": (3.2, 3.6), "mlp": (5.1, 6.0)},
        {0.1: 95.0, 0.3: 73.0, 0.9: 5.0},
        {0.3: 83.0, 0.9: 20.0},
    ),
    "lora": Forgetting({"attention": (0.47, 0.78)}, {0.1: 95.24, 0.9: 94.78}, {0.1: 100.0, 0.9: 90.6}),
}
COEFS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
