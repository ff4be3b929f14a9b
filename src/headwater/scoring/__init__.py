"""What a rollout is worth: rewards, group advantages, token weights and teacher scores."""
