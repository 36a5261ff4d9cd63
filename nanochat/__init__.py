import os

# GNU OpenMP's threads spin for milliseconds where they wait for each other. When anything else wants a core, each of the many
# short waits of a small model then costs a whole time slice: two tiny trainings side by side on two cores became twenty times
# slower. Spinning for microseconds keeps nearly all of the speed. It is read when PyTorch is loaded, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
