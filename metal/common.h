// Shared by all kernels: stands before each kernel's body.
