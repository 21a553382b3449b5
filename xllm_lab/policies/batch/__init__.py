"""Which requests compute how many tokens in the next step: admission, chunking and preemption. One file a policy."""
