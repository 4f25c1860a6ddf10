"""Put on a script's path by `loraplus doctor`: Python imports `sitecustomize` from here as it starts."""
