"""What a kernel can do wrong, as an exception."""


class KernelError(RuntimeError):
    """A kernel does not compile, or did something that Metal does not allow or define.

    The message names the kernel, the line of its source and the threads involved.
    """
