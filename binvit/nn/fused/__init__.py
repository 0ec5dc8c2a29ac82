"""Compiled training steps: the hot places of forward and backward pass in few passes over memory."""
