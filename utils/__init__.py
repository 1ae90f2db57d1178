"""What everything else stands on. It is loaded before torch is, which reads the environment only then."""

import os

# A thread that waits for the others soon sleeps. By default it spins long; where it so keeps a core from the very
# thread that it waits for, as beside another program, a step takes many times as long. It changes no bit.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
