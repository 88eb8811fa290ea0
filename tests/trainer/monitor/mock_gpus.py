"""GPUs that a test makes up, since the machine of the tests has none."""


class MockGpus:
    """`count` equal GPUs, but for what is given: GiB free of 80 by index, speeds by index or pair,
    errors by index or pair."""

    def __init__(self, count, free=(), flops=(), links=(), errors=()):
        self.names = ["Mock"] * count
        self.free, self.flops, self.links = dict(free), dict(flops), dict(links)
        self.errors = dict(errors)

    def memory(self, i):
        return self.free.get(i, 79) << 30, 80 << 30

    def multiply(self, i):
        self._fail(i)
        return self.flops.get(i, 700e12)

    def copy(self, i, j):
        self._fail((i, j))
        return self.links.get((i, j), 200e9)

    def _fail(self, where):
        if where in self.errors:
            raise RuntimeError(f"{self.errors[where]}\nCompile with TORCH_USE_CUDA_DSA")
