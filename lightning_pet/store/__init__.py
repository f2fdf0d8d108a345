"""Files: manifest, fingerprint, atomic writer, strict reader."""
