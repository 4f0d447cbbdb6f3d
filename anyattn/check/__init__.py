"""`anyattn check`: holds a backend to the conformance kit on this machine, and times it."""
