"""The cache on disk: writing, reading, locking and checking stores (see ``teacher_cache/README.md``)."""

from samfeat.teacher_cache.store.store import TeacherCache, open_stores, store_paths

__all__ = ["TeacherCache", "open_stores", "store_paths"]
