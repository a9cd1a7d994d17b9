"""What the text files beside a model say, as Hugging Face's libraries write and read them."""
