THEORY = {}
