"""harmconvert: pretrained CNNs to harmonic form, exactly or with the high frequencies cut away."""
