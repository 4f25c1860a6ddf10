"""The model and the movie reviews of `make demo`: python examples/making/demo_data.py data"""

from __future__ import annotations

import sys
from pathlib import Path

from loraplus.errors import LoraPlusError
from loraplus.reproduce.assets import RATED, REVIEWS, Asset, csv_text, obtain, rated_lines


def reviews_csv(files: dict[str, bytes]) -> str:
    """Turns rated lines into text,label rows; the label is the sign of the mean rating, 0 has none and is left out."""
    (ground_truth,) = files.values()
    rated = rated_lines(ground_truth)
    return csv_text(("text", "label"), ((text, "positive" if mean > 0 else "negative") for mean, text in rated if mean))


MOVIE_REVIEWS = Asset(
    RATED,
    REVIEWS,
    "movie-reviews.csv",
    reviews_csv,
    "4cd3114ce70d9450b9bb1901e32772e167a3429b5a78bf0731f2f1ec3f71e860",
)


def main(folder: str = "data") -> int:
    """Obtains both; exit code 2 with one line if that cannot be done."""
    try:
        for asset in ("minilm-l6", MOVIE_REVIEWS):
            obtain(asset, Path(folder))
    except LoraPlusError as error:
        print(f"loraplus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
