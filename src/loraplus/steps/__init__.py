"""What an optimizer's step does: asked of a twin, tried on stand-ins, measured in each layer's output."""
