"""The pictures of docs/gallery.md, by the commands that stand there.

python tests/benchmarks/draw_gallery.py

All but similarity.jpg, which is a screenshot of the page that `samfeat-cli app` serves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "gallery.md"
WIDTH, QUALITY = 1200, 72


def main() -> None:
    page = PAGE.read_text()
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["bash", "-euc", commands], cwd=folder, env=environment, check=True)
        for drawn in sorted((Path(folder) / "out").glob("*.png")):
            picture = Image.open(drawn).convert("RGB")
            picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS)
            out = PAGE.parent / "gallery" / f"{drawn.stem}.jpg"
            picture.save(out, quality=QUALITY, optimize=True)
            print(out)


if __name__ == "__main__":
    main()
