"""Run models on samples and store what data-aware methods need of the layer inputs."""
