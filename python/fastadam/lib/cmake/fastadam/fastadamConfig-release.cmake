#----------------------------------------------------------------
# Generated CMake target import file for configuration "Release".
#----------------------------------------------------------------

# Commands may need to know the format version.
set(CMAKE_IMPORT_FILE_VERSION 1)

# Import target "fastadam::fastadam" for configuration "Release"
set_property(TARGET fastadam::fastadam APPEND PROPERTY IMPORTED_CONFIGURATIONS RELEASE)
set_target_properties(fastadam::fastadam PROPERTIES
  IMPORTED_LOCATION_RELEASE "${_IMPORT_PREFIX}/fastadam/lib/libfastadam.so"
  IMPORTED_SONAME_RELEASE "libfastadam.so"
  )

list(APPEND _cmake_import_check_targets fastadam::fastadam )
list(APPEND _cmake_import_check_files_for_fastadam::fastadam "${_IMPORT_PREFIX}/fastadam/lib/libfastadam.so" )

# Commands beyond this point should not need to know the version.
set(CMAKE_IMPORT_FILE_VERSION)
