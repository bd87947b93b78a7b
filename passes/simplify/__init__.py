"""The same graph, plainer: folding, removing, inlining."""
