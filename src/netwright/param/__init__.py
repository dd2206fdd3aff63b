"""Where parameters start and how they are written: initialization, parameterization and scaling."""
