"""All that is written goes through here: whole or not there, held to what it was when it is read. No tensors."""
