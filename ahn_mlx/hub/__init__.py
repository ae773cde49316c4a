"""Models by name: where they are published, and how they come to this machine."""
