"""A run's settings as the configuration of another project, with what that cannot say."""
