"""Pictures with masks, as they come on disk, made into what training takes."""
