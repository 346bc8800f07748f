"""A machine that runs the kernels' compiled PTX on a CPU, and watches memory: see the README."""
