#!/bin/sh
# On a Mac: AHN.xcframework of libahn and the libmlx of the Python wheel that exports models, and
# mlx.metallib among the Swift package's resources.
#     embed/scripts/make-xcframework.sh [PYTHON] [SIGNING-IDENTITY]
# The identity "-" signs for this machine only. Run again after each update of MLX: a model can be
# opened only by the version that exported it.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
identity=${2:--}
mlx=$("$python" -c 'import mlx.core, pathlib; print(pathlib.Path(mlx.core.__file__).parent)')
build=$here/build-xcframework
rm -rf "$build" "$here/AHN.xcframework"

# Both libraries find each other beside themselves.
cmake -S "$here" -B "$build" -DMLX_ROOT="$mlx" -DCMAKE_OSX_ARCHITECTURES=arm64 \
  -DCMAKE_OSX_DEPLOYMENT_TARGET=14.0 -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
  "-DCMAKE_INSTALL_RPATH=@loader_path" "-DCMAKE_INSTALL_NAME_DIR=@rpath"
cmake --build "$build" --target ahn

# One framework with both: an XCFramework has one binary, which loads the other from its inside.
framework=$build/CAHN.framework
mkdir -p "$framework/Versions/A/Headers" "$framework/Versions/A/Modules" \
  "$framework/Versions/A/Resources"
cp "$here/include/ahn.h" "$framework/Versions/A/Headers/"
cat > "$framework/Versions/A/Modules/module.modulemap" <<'M'
framework module CAHN {
  umbrella header "ahn.h"
  export *
}
M
cat > "$framework/Versions/A/Resources/Info.plist" <<'P'
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>CFBundleExecutable</key><string>CAHN</string>
  <key>CFBundleIdentifier</key><string>org.ahn-mlx.CAHN</string>
  <key>CFBundlePackageType</key><string>FMWK</string>
  <key>CFBundleShortVersionString</key><string>1.0</string>
  <key>CFBundleVersion</key><string>1</string>
  <key>LSMinimumSystemVersion</key><string>14.0</string>
</dict>
</plist>
P
cp "$build/libahn.dylib" "$framework/Versions/A/CAHN"
cp "$mlx/lib/libmlx.dylib" "$framework/Versions/A/"
# What else the wheel's library needs lies beside it.
for library in "$mlx"/lib/*.dylib; do
  case $library in
    */libmlx.dylib) ;;
    *) cp "$library" "$framework/Versions/A/" ;;
  esac
done
install_name_tool -id @rpath/CAHN.framework/Versions/A/CAHN "$framework/Versions/A/CAHN"
ln -s A "$framework/Versions/Current"
for name in CAHN Headers Modules Resources; do
  ln -s "Versions/Current/$name" "$framework/$name"
done
for library in "$framework"/Versions/A/*.dylib; do
  codesign --force --timestamp=none --sign "$identity" "$library"
done
codesign --force --timestamp=none --sign "$identity" "$framework"

xcodebuild -create-xcframework -framework "$framework" -output "$here/AHN.xcframework"

# Not in Frameworks, where it cannot be signed.
cp "$mlx/lib/mlx.metallib" "$here/swift/Sources/AHN/mlx.metallib"
echo "wrote $here/AHN.xcframework and swift/Sources/AHN/mlx.metallib"
