"""Checkpoints on disk: finds their files, reads their tensors, and translates names and layouts.

checkpoint.py, in the root, joins these modules. From a path to tensors:

weight_files.py finds the files: model.pth, safetensors or .bin, a single file or shards.
formats.py reads their headers: name -> Part (file, offset, dtype, shape), and reads Parts.
hf.py translates config.json to ModelArgs, and tensor names of Hugging Face to ours.
families/ has a function for each family that reads its config, and its names of tensors.
config.py checks the values of a config.json.
int4_layouts.py converts the packed tensors of GPTQ and AWQ checkpoints.
stored.py joins these: our tensor name -> StoredTensor, one or more Parts and a conversion.
allocation.py allocates a meta-device model's tensors, which Checkpoint.load_into then fills.
saving.py writes a model.pth, atomically.
hub.py resolves the id of a Hugging Face repository to a folder, downloading what is missing.

To add a model family, see CONTRIBUTING.md.
Sources: github.com/huggingface/safetensors; the configurations of transformers; AutoGPTQ, AutoAWQ.
"""
