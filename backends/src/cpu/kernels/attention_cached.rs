//! attention_cached
