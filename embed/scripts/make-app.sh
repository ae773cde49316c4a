#!/bin/sh
# On a Mac: AHNSample.app with a model inside, sandboxed and signed.
#     embed/scripts/make-app.sh MODEL.ahnmodel [SIGNING-IDENTITY]
# Needs AHN.xcframework: make-xcframework.sh makes it. With a Developer ID the app can then be
# notarized: docs/embedding.md says how.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
model=$1
identity=${2:--}
sample=$here/Sample
app=$sample/AHNSample.app/Contents
swift build --package-path "$sample" -c release
products=$(swift build --package-path "$sample" -c release --show-bin-path)
rm -rf "$sample/AHNSample.app"
mkdir -p "$app/MacOS" "$app/Frameworks" "$app/Resources"
cp "$products/AHNSample" "$app/MacOS/"
cp -R "$products/CAHN.framework" "$app/Frameworks/"
# The package's resources, mlx.metallib among them.
cp -R "$products"/*.bundle "$app/Resources/"
cp -R "$model" "$app/Resources/Model.ahnmodel"
install_name_tool -add_rpath @executable_path/../Frameworks "$app/MacOS/AHNSample"
cat > "$app/Info.plist" <<'P'
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>CFBundleExecutable</key><string>AHNSample</string>
  <key>CFBundleIdentifier</key><string>org.ahn-mlx.sample</string>
  <key>CFBundleName</key><string>AHNSample</string>
  <key>CFBundlePackageType</key><string>APPL</string>
  <key>CFBundleShortVersionString</key><string>1.0</string>
  <key>LSMinimumSystemVersion</key><string>14.0</string>
</dict>
</plist>
P
for library in "$app"/Frameworks/CAHN.framework/Versions/A/*.dylib; do
  codesign --force --options runtime --timestamp=none --sign "$identity" "$library"
done
codesign --force --options runtime --timestamp=none --sign "$identity" \
  "$app/Frameworks/CAHN.framework"
codesign --force --options runtime --timestamp=none --sign "$identity" \
  --entitlements "$sample/Sample.entitlements" "$sample/AHNSample.app"
codesign --verify --deep --strict "$sample/AHNSample.app"
echo "wrote $sample/AHNSample.app"
