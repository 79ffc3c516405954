from standin import Chunker, EmbeddingDatabase, EmbeddingsWithFixes, strict


class ClassicTextProcessingEngine(Chunker):
    def __init__(self, text_encoder, tokenizer):
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.embeddings = self.database = self.fixes_owner = EmbeddingDatabase()
        embeddings = getattr(text_encoder.transformer, "text_model", text_encoder.transformer).embeddings
        embeddings.token_embedding = EmbeddingsWithFixes(embeddings.token_embedding, self.embeddings)
        self.set_ids()

    def encode_with_transformers(self, tokens):
        return self.text_encoder.transformer(tokens, output_hidden_states=True).last_hidden_state

    def __call__(self, texts):
        return self.encode_texts(texts)


strict(__name__)
