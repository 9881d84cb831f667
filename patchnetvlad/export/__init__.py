"""The model and its descriptors in other people's programs: ONNX, torch.export, TorchScript, hloc."""
