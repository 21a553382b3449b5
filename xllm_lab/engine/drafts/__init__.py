"""Who makes drafts in the engine, and how they are verified."""
