"""Drafts in the engine: who makes them, and what the model keeps of them.

`ngram` and `suffix` propose what followed when the last tokens came before, in the request itself or in those that
ended; no model is asked. `draft_model` asks a smaller model, `mtp` the model's own prediction module. `verify` compares
drafts with the logits of the step that computed them, and is the same whoever made them.
"""
