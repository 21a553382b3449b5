"""What is wrong with a configuration of xLLM or vLLM-Ascend, why, and what would be right."""
