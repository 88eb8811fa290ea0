"""forescale: everything between a config and a trained model."""
