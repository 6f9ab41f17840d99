"""What a fold tells: tables, sentences, pictures, cost."""
