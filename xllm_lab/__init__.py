"""A simulation-backed research and tuning platform for the xLLM inference engine."""
