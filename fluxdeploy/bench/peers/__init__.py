"""Other ways to run the same model: diffusers, OpenVINO's own conversion, optimum-onnx."""
