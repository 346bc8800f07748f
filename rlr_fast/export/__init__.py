"""A trained model as a file for other runtimes, compared with the model before it is kept.

May import `inference` and all below it. ONNX, ONNX Runtime and OpenVINO are imported where they are
used: the package works without them.
"""
