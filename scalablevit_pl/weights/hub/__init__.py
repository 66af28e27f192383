"""Download and upload folders of models with the Hugging Face Hub."""
