"""Score image files with an exported model: python onnx_example.py MODEL.onnx [CLASS] IMAGES.

It needs numpy, onnxruntime and pillow, and nothing else.
"""

import csv
import json
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image

if len(sys.argv) < 3:
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["rlr_fast"])
height, width = about["input_size"]
# Decisions have a column per class, and a last one for images of which the class is not known.
known = sys.argv[2] in about["classes"]
column = about["classes"].index(sys.argv[2]) if known else -1
paths = sys.argv[3 if known else 2 :]
missing = [path for path in paths if not os.path.exists(path)]
if missing or not paths:
    sys.exit(f"no image: {missing}; the classes are {', '.join(about['classes'])}")

failed = 0
for path in paths:
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr)
        failed = 1
        continue
    if about["tile"] and list(image.size) != about["tile"][::-1]:
        sys.exit(f"{path}: the file takes tiles of {about['tile']} (height, width), not pictures")
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        clear = " and a clear color" if "transparency" in image.info else ""
        sys.exit(
            f"{path}: pixels of mode {image.mode}{clear}; docs/data.md says what becomes of them"
        )
    if image.size != (width, height):
        if about["input_size"] != about["image_size"]:
            sys.exit(f"{path}: {image.size} pixels, and the file takes {width} x {height}")
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    batch = np.asarray(image.convert("RGB"))[None]  # (B, H, W, 3), uint8
    names = [output.name for output in session.get_outputs()]
    result = dict(zip(names, session.run(names, {"images": batch}), strict=True))
    line = [path, f"{result['score'][0]:.6f}"]
    if about["thresholds"]:
        marked = (result["score_map"][0] > about["thresholds"][column]["pixel"]).mean()
        word = "anomalous" if result["anomalous"][0, column] else "normal"
        line += [f"{result['p_value'][0, column]:.6f}", word, f"{marked:.6f}"]
    csv.writer(sys.stdout, lineterminator="\n").writerow(line)
sys.exit(failed)
