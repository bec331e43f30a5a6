from small_training import digits, folder  # noqa: F401  (fixtures)
