"""How the steps of an algorithm are found while it runs: curvature measured over the federation, and a pace for x."""
