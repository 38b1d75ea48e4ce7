"""What an attention mask says: the formula over positions that its graph computes, found without computing it."""
